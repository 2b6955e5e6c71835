# SPDX-License-Identifier: Apache-2.0
"""INT against FP: theory and measurement of QSNR and crest factor, on drawn and on real data.

`run.study` measures, `summary` says what came out, `tables` and `charts` show it. Between them
stands plain data, the JSON that `pyfmt study` writes:

    schema, complete    1; false while parts are missing
    settings, machine   what a run is repeated, and its numbers placed, with
    theory              for each pair of rivals: its crossover, and what a block can reach
    data                dataset -> qsnr[rotation][format][choice] in dB, crest, points, by_sigma
    model               name, left_out, tensors: name, kind, shape, crest, qsnr as above

`choice` is a scale rule or a recipe ("amax" where a format has neither), `rotation` a size or "0".
A crest entry is [mean, 5, 25, 50, 75, 95 %, largest] over blocks; a point of a format is
[crest factor, QSNR, blocks] over the blocks of one narrow range of crest factors.
"""
