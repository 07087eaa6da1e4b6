"""Rules for functions of torch: their spellings, and whoever calls them."""
