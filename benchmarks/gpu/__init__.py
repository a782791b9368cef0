"""One command for a bare machine with one GPU: what it shows of the project, most telling first."""
