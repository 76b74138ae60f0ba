//! The agent with an API server, and with its faults.
#![expect(clippy::unwrap_used, reason = "every failure here fails a test")]

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
