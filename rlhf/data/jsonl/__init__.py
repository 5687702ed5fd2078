"""A user's own records, in three files of one JSON object a line."""
