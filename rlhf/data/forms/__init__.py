"""What data files look like: our own lines and those of public data sets, one module a form."""
