//! Known mistakes, made one at a time in a copy of the sources: each must be caught.
