//! Starts the process that makes the calls, in its own cgroup.

use std::{
    fs, io,
    path::{Path, PathBuf},
    process::Stdio,
    thread,
    time::Duration,
};

use tokio::{process::Command, sync::Mutex, time::timeout};

use super::calls::CallReport;

/// Timeout of all calls together.
const PATIENCE: Duration = Duration::from_secs(20);
/// Timeout of a call from an excluded cgroup. The cgroup may be frozen, and other exclusions wait.
const EXEMPT_PATIENCE: Duration = Duration::from_secs(5);
/// Name of the cgroup, below the served one. Always the same, so that the next agent uses and removes what a
/// killed one left.
const NAME: &str = "socklb-self-test";

/// Where the calls came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Caller {
    /// A cgroup created for them.
    FreshCgroup,
    /// The agent's own cgroup, since none could be created or entered, for this reason. The calls then prove
    /// only that this cgroup is served.
    OwnCgroup(String),
}

/// Result of a self-test.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// Where the calls came from.
    pub caller: Caller,
    /// The problems; empty if the test passed.
    pub problems: Vec<String>,
}

/// Result of a call from an excluded cgroup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Exempt {
    /// The call passed unchanged.
    LeftAlone,
    /// The call was redirected, or failed in another way.
    Failed(String),
    /// No call was made, for this reason.
    NotMade(String),
}

/// Makes the calls once, below the served cgroup.
///
/// A problem of the test itself counts as a failure.
pub async fn run(served: &Path, has_ipv6: bool) -> Outcome {
    let _turn = TURN.lock().await;
    let fresh = Fresh::make(served);
    let cgroup = fresh.as_ref().ok().map(|fresh| fresh.0.as_path());
    let report = ask(cgroup, has_ipv6.then_some("--ipv6"), PATIENCE)
        .await
        .unwrap_or_else(|problem| CallReport { stayed: None, problems: vec![problem] });
    let caller = match (&fresh, report.stayed) {
        (Err(error), _) => Caller::OwnCgroup(error.clone()),
        (Ok(_), Some(why)) => Caller::OwnCgroup(why),
        (Ok(_), None) => Caller::FreshCgroup,
    };
    Outcome { caller, problems: report.problems }
}

/// Makes a call from a fresh cgroup below an excluded one.
///
/// The result is meaningful only while the self-test passes.
pub async fn run_below_excluded(excluded: &Path) -> Exempt {
    match Fresh::make(excluded) {
        Ok(fresh) => exempt(Some(&fresh.0)).await,
        Err(error) => Exempt::NotMade(error),
    }
}

/// Makes a call from this process's own cgroup, which is excluded while the result of `exclude` lives. No
/// self-test runs meanwhile.
pub async fn run_excluded<E>(exclude: impl FnOnce() -> Result<E, String>) -> Exempt {
    let _turn = TURN.lock().await;
    match exclude() {
        Ok(_excluded) => exempt(None).await,
        Err(problem) => Exempt::NotMade(problem),
    }
}

/// Held by calls that depend on the own cgroup's exclusion.
static TURN: Mutex<()> = Mutex::const_new(());

async fn exempt(cgroup: Option<&Path>) -> Exempt {
    match ask(cgroup, Some("--excluded"), EXEMPT_PATIENCE).await {
        Ok(CallReport { stayed: Some(why), .. }) | Err(why) => Exempt::NotMade(why),
        Ok(CallReport { problems, .. }) if problems.is_empty() => Exempt::LeftAlone,
        Ok(CallReport { problems, .. }) => Exempt::Failed(problems.join("; ")),
    }
}

/// Runs a process that makes calls from a cgroup, or from this process's own. Returns its report, or why
/// there is none.
async fn ask(cgroup: Option<&Path>, flag: Option<&str>, patience: Duration) -> Result<CallReport, String> {
    // The running program, even if its file was replaced or is not visible.
    let mut command = Command::new("/proc/self/exe");
    command
        .arg0("socklb")
        .arg("self-test-calls")
        .args(flag)
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    if let Some(cgroup) = cgroup {
        command.arg("--cgroup").arg(cgroup);
    }
    let failed = |problem: String| format!("the process that makes the calls: {problem}");
    let output = match timeout(patience, command.output()).await {
        Ok(output) => output.map_err(|error| failed(error.to_string()))?,
        Err(_elapsed) => return Err(format!("the calls did not finish within {} s", patience.as_secs())),
    };
    serde_json::from_slice(&output.stdout).map_err(|_no_report| {
        let said = String::from_utf8_lossy(&output.stderr);
        failed(format!("{}: {}", output.status, said.lines().last().unwrap_or("no output")))
    })
}

/// A cgroup that is removed on drop, once it is empty.
#[derive(Debug)]
struct Fresh(PathBuf);

/// Removes the cgroup that a killed agent's self-test left below this one, and returns its path.
#[must_use]
pub fn remove_leftover(served: &Path) -> Option<PathBuf> {
    let cgroup = served.join(NAME);
    // A cgroup that cannot be removed is in use: its self-test removes it.
    fs::remove_dir(&cgroup).is_ok().then_some(cgroup)
}

impl Fresh {
    /// Creates it. The error names the path that could not be created or written.
    fn make(parent: &Path) -> Result<Self, String> {
        let error = |path: &Path, error: &io::Error| format!("{}: {error}", path.display());
        let cgroup = Self(parent.join(NAME));
        match fs::create_dir(&cgroup.0) {
            Err(cause) if cause.kind() != io::ErrorKind::AlreadyExists => {
                return Err(error(&cgroup.0, &cause));
            }
            _ => {}
        }
        // Below a threaded cgroup, a new one must be threaded as well.
        let kind = cgroup.0.join("cgroup.type");
        let threaded = fs::read_to_string(&kind).and_then(|found| {
            if found.trim() == "domain invalid" { fs::write(&kind, "threaded") } else { Ok(()) }
        });
        threaded.map_err(|cause| error(&kind, &cause))?;
        Ok(cgroup)
    }
}

impl Drop for Fresh {
    fn drop(&mut self) {
        // When the agent exits during a self-test, the killed process is in the cgroup for a moment longer.
        // If it stays, the next self-test reuses the cgroup.
        for _ in 0..100 {
            match fs::remove_dir(&self.0) {
                Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {
                    thread::sleep(Duration::from_millis(1));
                }
                _ => return,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A directory stands in for a cgroup: both can be removed only while empty.
    #[test]
    fn what_is_left_is_removed_unless_it_is_in_use() {
        let served = tempfile::tempdir().unwrap();
        assert_eq!(remove_leftover(served.path()), None);
        let (left, child) = (served.path().join(NAME), served.path().join(NAME).join("child"));
        fs::create_dir_all(&child).unwrap();
        assert_eq!(remove_leftover(served.path()), None);
        fs::remove_dir(child).unwrap();
        assert_eq!(remove_leftover(served.path()), Some(left));
    }
}
