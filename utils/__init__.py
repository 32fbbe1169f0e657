"""Small, generic tools that know nothing of data sets, networks or methods."""
