"""The teacher's knowledge: one file a kind, gathered in :mod:`segkd.pipeline.student.knowledge.config`.

A new kind is one file here, one line in ``KnowledgeConfig`` and one test; ``pyproject.toml`` lists the package.
"""
