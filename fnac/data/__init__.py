"""Clips: generated (:mod:`.generate`), out of videos (:mod:`.extract`) or as others lay them out (:mod:`.layout`,
:mod:`.avsbench`), as a data set (:mod:`.dataset`) and a Lightning data module (:mod:`.datamodule`).
"""
