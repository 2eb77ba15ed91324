"""What tests of several folders share: small models, the float64 oracle, trained runs, and what is read from them."""
