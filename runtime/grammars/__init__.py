"""Grammars: from the text of a schema, an expression or a grammar to the tokens that may follow."""


class GrammarError(ValueError):
    """A grammar cannot be used. The message gives the reason, and is safe to show to the client: it
    has no text of the grammar but names of JSON schema keywords.
    """
