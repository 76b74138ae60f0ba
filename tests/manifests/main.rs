//! What is applied to clusters and installed on hosts: whether Kubernetes, Prometheus and systemd would read it as it is
//! meant.
//!
//! Nothing here talks to a cluster. [`kustomize`] renders the overlays, and kubectl too where it is new enough; the types of
//! k8s-openapi, made from Kubernetes' own description of its API, stand for the API server's reading.
#![expect(clippy::unwrap_used, reason = "what fails here fails a test")]

mod dashboard;
mod kustomize;
mod overlays;
mod rendered;
mod systemd;
