"""Floor 0, graphs: their IR, vocabularies, checks, passes, text forms and model builders."""
