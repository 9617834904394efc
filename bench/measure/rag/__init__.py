"""Retrieval-augmented generation: does a compressed model still answer from its sources?

    collection  documents, questions, judgements          readers    the files that they come from
    chunking    documents -> chunks                       retrieval  chunks -> ranked hits (BM25, dense, hybrid)
    vectors     exact, FAISS and Qdrant indexes           encoders   texts -> vectors
    pipeline    a question -> its context, once for all recipes
    answers     question and context -> prompt -> answer  robustness other contexts for the same questions
    overlap     what is shared by two texts               ranking    how good a ranking is
    tables      tables 26 to 30 of [E]

Importing this package imports nothing else.
"""
