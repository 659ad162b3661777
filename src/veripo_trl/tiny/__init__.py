"""The embedded offline world: clips, questions, a model and a judge, all made on the spot from a
seed.

`veripo_trl.tiny.world.make_world` makes it. Nothing here is imported by the rest of the package
except by name from recipes, tests and benchmarks.
"""
