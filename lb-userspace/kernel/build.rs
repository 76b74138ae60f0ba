//! Copies the compiled BPF object to where `kernel::object` embeds it.
//!
//! `cargo xtask build` compiles the object and passes its path in `SOCKLB_BPF_OBJECT`. Without it, as in a
//! plain `cargo check`, an empty object is embedded that fails to load with a clear message. A release build
//! needs the object.

use std::{env, fs, io, path::PathBuf};

fn main() -> io::Result<()> {
    println!("cargo::rerun-if-env-changed=SOCKLB_BPF_OBJECT");
    let out = PathBuf::from(env::var_os("OUT_DIR").unwrap_or_default()).join("socklb.bpf.o");
    match env::var_os("SOCKLB_BPF_OBJECT") {
        Some(path) => {
            let path = PathBuf::from(path);
            println!("cargo::rerun-if-changed={}", path.display());
            let object = fs::read(&path).map_err(|error| {
                io::Error::new(error.kind(), format!("SOCKLB_BPF_OBJECT={}: {error}", path.display()))
            })?;
            fs::write(out, object)
        }
        None if env::var("PROFILE").is_ok_and(|profile| profile == "release") => {
            println!(
                "cargo::error=a release build of socklb needs the BPF object: use \
                `cargo xtask build --release`"
            );
            Ok(())
        }
        None => fs::write(out, []),
    }
}
