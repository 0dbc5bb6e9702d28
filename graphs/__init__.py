"""Floor 0, what a graph is: the IR, its vocabulary and types, passes, text forms and model builders."""
