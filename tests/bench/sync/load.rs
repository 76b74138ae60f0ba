//! Changes at a constant rate, and when each is in the kernel's maps.

use std::{
    collections::BTreeMap,
    net::Ipv4Addr,
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use anyhow::bail;
use lb_tests::apiserver::{ApiServer, Kind};

use super::tables::{LOOK, PATIENCE, Tables};
use crate::{
    daemon::Daemon,
    objects::{self, Pod, Size},
};

pub(crate) struct Rate {
    pub(crate) n_changing: u32,
    pub(crate) per_second: u32,
    pub(crate) time: Duration,
}

/// Replaces one pod of one slice after the other. Returns the durations from the server's write of the event
/// until calls may reach the new pod, and the share of a core that the agent used.
///
/// A thread polls the maps and sleeps in between, so the times are up to 0.1 ms too long.
pub(crate) fn churn(
    server: &ApiServer,
    agent: &Daemon,
    tables: &mut Tables,
    size: Size,
    rate: &Rate,
) -> anyhow::Result<(Vec<Duration>, f64)> {
    // The default timer slack adds 50 microseconds to each sleep.
    nix::sys::prctl::set_timerslack(1)?;
    let written = server.written();
    let (announce, announced) = mpsc::channel::<(u32, Ipv4Addr)>();
    let mut latencies = Vec::new();
    let (cpu_before, since) = (agent.cpu_time()?, Instant::now());
    thread::scope(|scope| -> anyhow::Result<()> {
        let changing = scope.spawn(move || change(server, size, rate, &announce));
        let mut wanted: BTreeMap<u32, Ipv4Addr> = BTreeMap::new();
        let mut pending: Vec<(u32, Ipv4Addr, Instant)> = Vec::new();
        loop {
            let has_ended = changing.is_finished();
            // Every change is announced before it is written. So after the events are read, the announcements
            // of all of them are available.
            let events: Vec<_> = written.try_iter().collect();
            wanted.extend(announced.try_iter());
            for event in events {
                if event.kind == Kind::Slice
                    && let Some(service) = objects::number(&event.name.1)
                    && let Some(ip) = wanted.remove(&service)
                {
                    pending.push((service, ip, event.at));
                }
            }
            pending.retain(|(service, ip, written)| {
                let is_there = tables.has(*service, *ip);
                if is_there {
                    latencies.push(written.elapsed());
                }
                !is_there
            });
            if let Some((service, ip, _)) = pending.iter().find(|(_, _, at)| at.elapsed() > PATIENCE) {
                bail!("service {service} never gets {ip}; {}", agent.last_words());
            }
            if has_ended && pending.is_empty() && wanted.is_empty() {
                return Ok(());
            }
            thread::sleep(LOOK);
        }
    })?;
    let share = agent.cpu_time()?.saturating_sub(cpu_before).as_secs_f64() / since.elapsed().as_secs_f64();
    // Restores the objects for the next measurement.
    for service in 0..rate.n_changing {
        server.apply(objects::slice(&objects::name(service), &size.pods(service)));
    }
    tables.until_right(size)?;
    Ok((latencies, share))
}

/// Changes slices in turn, each time another pod.
fn change(server: &ApiServer, size: Size, rate: &Rate, announce: &mpsc::Sender<(u32, Ipv4Addr)>) {
    let mut pods: Vec<Vec<Pod>> = (0..rate.n_changing).map(|service| size.pods(service)).collect();
    let started = Instant::now();
    let interval = Duration::from_secs(1) / rate.per_second;
    for (number, service) in (0..).zip((0..rate.n_changing).cycle()) {
        let due = started + interval * number;
        if due.duration_since(started) >= rate.time {
            return;
        }
        // Does not catch up: a burst would be a different load.
        thread::sleep(due.saturating_duration_since(Instant::now()));
        let ip = objects::new_pod(number);
        let pods = &mut pods[service as usize];
        let replaced = (number / rate.n_changing) as usize % pods.len();
        pods[replaced] = Pod::ready(ip);
        let slice = objects::slice(&objects::name(service), pods);
        if announce.send((service, ip)).is_err() {
            return;
        }
        server.apply(slice);
    }
}
