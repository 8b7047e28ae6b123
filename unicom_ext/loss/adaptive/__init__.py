"""Margins that differ from sample to sample, made of each batch: modules that give a
`CombinedMargin` for ``loss(embeddings, labels, margin=margins(embeddings, labels))``.

Modules, each on those before it: `batch` (what they share), `noise` (normal numbers by a counter),
`norms` (AdaFace, MagFace), `elastic` (ElasticFace), `class_size`.
"""
