"""LongBench's English and code tasks, by its own protocol, through quantised caches.

LongBench: Bai et al., "LongBench: a bilingual, multitask benchmark for long context understanding", ACL 2024
(arXiv 2308.14508), and its scripts ``pred.py``, ``eval.py`` and ``metrics.py``, which are what its published scores
come from. `tasks` says what there is, `data` reads its files, `protocol` asks, `metrics` scores, `published` holds what
others reported, and `run` puts them together.
"""
