//! The agent against an API server, and against everything that goes wrong with one.
#![expect(clippy::unwrap_used, reason = "what fails here fails a test")]

mod any_server;
mod churn;
mod faults;
mod follower;
mod hostile;
mod kernel;
mod kubectl;
mod outage;
mod service_cidrs;
mod watches;
