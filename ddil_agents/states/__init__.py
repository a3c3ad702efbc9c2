"""Where training states come from: the sources, their priors, and the buffer that holds them."""
