"""Our ops inside other people's models. Each module imports the library it serves, so import them by name."""
