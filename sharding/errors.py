"""What a user can cause, and what befalls a run, told in one line."""


class UserError(Exception):
    """Something the user can mend: the message is one line saying what, where and what to do."""


class LostPeers(UserError):
    """Another process of the run is gone: what is left can only end, without waiting for an orderly goodbye."""
