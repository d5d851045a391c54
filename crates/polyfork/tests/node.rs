//! The primary with live runtimes as workers: stock Node 18 to 26, Deno, Bun, all unmodified.
//!
//! A module per promise of the cluster API; each scenario runs once per Node version, as a test of its own.
//! `support` has the cluster, `client` the clients. Programs are in `tests/node-apps` and `tests/apps`. How
//! Node's own tests map to these is in `docs/conformance/cluster.tsv`.
//!
//! The rule that surprises: most workers here are one program, `actor.cjs`, that runs what it is sent, so
//! that what a worker does stands beside what is expected of it.
#![allow(clippy::print_stdout, reason = "a test prints its counts")]

/// Makes scenarios tests, one for every Node version.
macro_rules! on_every_node {
    ($($scenario:ident),+ $(,)?) => {$(
        mod $scenario {
            #[test]
            fn node18() { crate::support::play(module_path!(), "node18", super::$scenario); }
            #[test]
            fn node20() { crate::support::play(module_path!(), "node20", super::$scenario); }
            #[test]
            fn node22() { crate::support::play(module_path!(), "node22", super::$scenario); }
            #[test]
            fn node24() { crate::support::play(module_path!(), "node24", super::$scenario); }
            #[test]
            fn node26() { crate::support::play(module_path!(), "node26", super::$scenario); }
        }
    )+};
}

/// For what does not depend on the version of Node.
macro_rules! on_nodes_20_and_26 {
    ($($scenario:ident),+ $(,)?) => {$(
        mod $scenario {
            #[test]
            fn node20() { crate::support::play(module_path!(), "node20", super::$scenario); }
            #[test]
            fn node26() { crate::support::play(module_path!(), "node26", super::$scenario); }
        }
    )+};
}

#[path = "node/client.rs"]
mod client;
#[path = "node/clusters.rs"]
mod clusters;
#[path = "node/datagrams.rs"]
mod datagrams;
#[path = "node/draining.rs"]
mod draining;
#[path = "node/exactness.rs"]
mod exactness;
#[path = "node/health.rs"]
mod health;
#[path = "node/leaving.rs"]
mod leaving;
#[path = "node/life.rs"]
mod life;
#[path = "node/listening.rs"]
mod listening;
#[path = "node/measures.rs"]
mod measures;
#[path = "node/others.rs"]
mod others;
#[path = "node/probes.rs"]
mod probes;
#[path = "node/reload.rs"]
mod reload;
#[path = "node/remote.rs"]
mod remote;
#[path = "node/support.rs"]
mod support;
#[path = "node/unprivileged.rs"]
mod unprivileged;
#[path = "node/watchdog.rs"]
mod watchdog;
