//! A storage over a storage: what changes, delays or refuses I/O, written once for any place in a chain.
