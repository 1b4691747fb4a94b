"""A device as a retriever of LangChain (`langchain.py`) or LlamaIndex (`llamaindex.py`): a home, or one that is served."""
