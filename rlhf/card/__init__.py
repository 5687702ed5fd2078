"""The report card of a reward model: figures with intervals, a grade, a page."""
