"""Answers of a trained model: an index of a corpus, and who asks it.

from qure_core.search import Retriever

retriever = Retriever.open("runs/quickstart/index")
answers = retriever.ask(image="photo.jpg", text="longer and in red", top=20)
"""

from typing import TYPE_CHECKING

from qure_core.base.lazy import lazy

if TYPE_CHECKING:
    from qure_core.search.index import Index
    from qure_core.search.retriever import Answer, Retriever

__all__ = ["Answer", "Index", "Retriever"]
__getattr__ = lazy(__name__, {"Answer": "retriever", "Index": "index", "Retriever": "retriever"})
