"""What a user can cause, told in one line."""


class UserError(Exception):
    """Something the user can mend: the message is one line saying what, where and what to do."""
