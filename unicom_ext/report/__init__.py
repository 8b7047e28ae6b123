"""One HTML page of what was found, with everything inside: `Page` says of what, `write` writes it.

    write("report.html", Page(title="Birds", lead="...", methods=Methods({...}, ours="our model")))

A page has the sections that it is given parts for. Parts are what a program has at hand anyhow:
figures as in metrics.json, `Embedded` images, labels of clusters. Nothing here runs a model.
"""

from unicom_ext.report.clusters import Clusters
from unicom_ext.report.methods import Methods
from unicom_ext.report.page import Headline, Page, write
from unicom_ext.report.queries import Queries
from unicom_ext.report.training import Training

__all__ = ["Clusters", "Headline", "Methods", "Page", "Queries", "Training", "write"]
