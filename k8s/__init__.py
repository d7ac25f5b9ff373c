"""Kubernetes manifests: base and components by kustomize for one client, stamped out here for as many as there are."""
