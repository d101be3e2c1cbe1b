"""Faults of all kinds, at seeded places, against real processes: a part in every test run, all of it by benchmarks/chaos.py.

server.py    has the libraries imported, and forks commands and ranks, so that a start costs tenths of a second
injection.py a fault inside a rank: at which beat of its heart, how long after it, what, to whom
bench.py     starts commands, waits for them, keeps the undisturbed runs to compare with; leaves no process behind
pieces.py    what there is, how often, and what must come of it; the cases are in the files beside it
"""
