"""The face of memfit: the command ``memfit``. Results go to standard output; progress and errors to standard error."""
