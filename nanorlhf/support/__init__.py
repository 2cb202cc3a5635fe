"""What any training program needs. Nothing here knows of RLHF or imports the course."""


class UserError(Exception):
    """A mistake that the user can mend, said in a sentence: what was expected, what came, where."""
