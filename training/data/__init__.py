"""The data path: plain WebDataset tars, read by position, in an order that is a pure function."""
