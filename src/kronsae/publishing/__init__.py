"""A run as others want it: folders in the formats of other libraries, model cards, Hub repositories."""
