# Debian's Prometheus in the place of prom/prometheus, which comes from a registry: same paths, same user.
ARG BASE_IMAGE
# hadolint ignore=DL3006
FROM ${BASE_IMAGE}
RUN apt-get update \
    && apt-get install --yes --no-install-recommends prometheus \
    && rm -rf /var/lib/apt/lists/* \
    && install --directory --owner 65534 --group 65534 /prometheus
# checkov:skip=CKV_DOCKER_2:the real image has no HEALTHCHECK either
USER 65534:65534
ENTRYPOINT ["/usr/bin/prometheus"]
