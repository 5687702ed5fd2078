"""A user's own records, in JSON files of any form that `reading` knows."""
