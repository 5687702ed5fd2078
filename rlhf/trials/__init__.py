"""Every job in small: a few updates of a tiny model, to be compared and looked at."""
