"""Product reviews, one a line, in a file of praise and a file of blame."""
