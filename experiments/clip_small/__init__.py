"""Every method on real image-text data that fits two cores: CIFAR-100 and Flickr8k."""
