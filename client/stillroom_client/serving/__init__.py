"""The `Retrieval` service of a device over gRPC (`retrieval.proto`), and its client. docs/serving.md is its manual."""
