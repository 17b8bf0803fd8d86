"""The service: a trained model and an index answer over HTTP, on Ray Serve.

`replicas` are the processes that encode and search, `ingress` what people and programs talk to,
`guard` what keeps it within its limits, `page` the page at /.
"""
