"""Eagle, Cell by Cell: the thin package that the notebooks import.

Rooms, each of which imports only from the rooms before it:

    data        tokenizer, binidx, make_data, magic_prime, dataset, corpus     notebooks 01 to 03
    wkv         the WKV-5 operator                                             notebooks 04 and 05
    model       configuration, RWKV-5.2, initial weights                       notebook 06
    training    flags, schedule, optimizer, checkpoints, the Lightning run     notebooks 07 and 10
    inference   sampling and generation                                        notebooks 08 and 09
    teaching    figures, widgets, checks of exercises, the self-check          every notebook

Importing it does nothing: no compiler, no download, no seed, no environment variable.
"""

__version__ = "0.1.0"
