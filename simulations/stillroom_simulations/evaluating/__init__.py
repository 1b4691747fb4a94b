"""How good a search is, on any corpus in BEIR layout: `stillroom evaluate`, and `evaluate_models` for programs.

specs      what a name on the command line means: one of the systems below           `specs.py`
systems    a search that can be indexed, asked and timed: the agreed interface       `systems.py`
towers     one vector a text: Sentence Transformers models, releases, pairs of both  `towers.py`, `sentence_models.py`
onnx       the ONNX files of a Sentence Transformers folder                          `onnx_models.py`
late       a vector a token, MaxSim over every passage                               `late.py`
rerankers  a cross-encoder behind another system                                     `rerankers.py`
words      BM25, as devices have it                                                  `words.py`
homes      the index of a device, as it is served                                    `homes.py`
timing     one query at a time, systems in turns                                     `timing.py`
run        all of it, with intervals and tests                                       `run.py`, `values.py`, `tables.py`
"""
