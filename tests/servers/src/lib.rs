//! Empty: the package is for its test.
