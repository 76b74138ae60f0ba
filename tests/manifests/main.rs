//! Manifests and the systemd unit: Kubernetes, Prometheus and systemd read them as intended.
//!
//! Nothing here needs a cluster. [`kustomize`] renders the overlays, and so does kubectl if it is new enough.
//! The types of k8s-openapi, generated from Kubernetes' API description, stand in for the API server.
#![expect(clippy::unwrap_used, reason = "every failure here fails a test")]

mod dashboard;
mod kustomize;
mod overlays;
mod rendered;
mod systemd;
