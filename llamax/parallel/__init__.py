"""Where arrays live: the mesh of devices, the tables of rules, and the functions that place and split arrays by them.

"Axis" means an axis of the mesh or the name that maps to one; a tensor has dimensions.
"""
