"""The practice problems of the seven systems, and the functions of this library that answer them."""
