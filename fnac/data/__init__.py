"""Clips on disk: generated ones (:mod:`.generate`), the VGG-SS layout (:mod:`.vggss`) and the Lightning data module."""
