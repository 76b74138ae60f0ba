//! The server process of `path`: HTTP over TCP and an echo over UDP, at all endpoint addresses.
//!
//! One thread each and one client at a time, so that the CPU time of the process is that of the work alone.

use std::{
    io::{self, IoSlice, IoSliceMut, Read as _, Write as _},
    net::{TcpListener, TcpStream},
    os::fd::AsRawFd as _,
    thread,
};

use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, SockaddrIn, bind,
    recvmsg, sendmsg, setsockopt, socket, sockopt,
};

use crate::{objects::TARGET_PORT, turns::stay_on};

/// The answer to every request: a small page.
pub(super) const ANSWER: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Length: 64\r\n\r\n\
    ................................................................";
const END: &[u8] = b"\r\n\r\n";

/// Serves until standard input closes, as it does when the parent exits.
pub(crate) fn run() -> anyhow::Result<()> {
    stay_on(super::CPU)?;
    let listener = TcpListener::bind(("0.0.0.0", TARGET_PORT))?;
    let echo = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    setsockopt(&echo, sockopt::Ipv4PacketInfo, &true)?;
    bind(echo.as_raw_fd(), &SockaddrIn::new(0, 0, 0, 0, TARGET_PORT))?;
    let _ends_with_the_process = thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            // A client that disconnects in the middle does not stop the server.
            let _gone = serve(stream);
        }
    });
    let _ends_with_the_process = thread::spawn(move || {
        loop {
            let _gone = answer(echo.as_raw_fd());
        }
    });
    let _until_the_end = io::copy(&mut io::stdin(), &mut io::sink())?;
    Ok(())
}

/// Answers requests until the client closes or requests a close.
fn serve(mut stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut buffer = vec![0; 1 << 16];
    let mut filled = 0;
    loop {
        let Some(head) = buffer[..filled].windows(END.len()).position(|part| part == END) else {
            let n = stream.read(&mut buffer[filled..])?;
            if n == 0 {
                return Ok(());
            }
            filled += n;
            continue;
        };
        let text = String::from_utf8_lossy(&buffer[..head]).into_owned();
        let header = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
        let length: u64 =
            header("Content-Length:").and_then(|length| length.parse().ok()).unwrap_or_default();
        let is_last = header("Connection:") == Some("close");
        let in_buffer = (filled - head - END.len()) as u64;
        let mut left = length.saturating_sub(in_buffer);
        while left > 0 {
            let n = stream.read(&mut buffer)? as u64;
            if n == 0 {
                return Ok(());
            }
            left = left.saturating_sub(n);
        }
        filled = 0;
        stream.write_all(ANSWER)?;
        if is_last {
            return Ok(());
        }
    }
}

/// Returns one datagram, from the address that it was sent to.
fn answer(socket: i32) -> nix::Result<()> {
    let mut buffer = [0; 2048];
    let mut control = nix::cmsg_space!(nix::libc::in_pktinfo);
    let (n, from, to) = {
        let mut parts = [IoSliceMut::new(&mut buffer)];
        let message = recvmsg::<SockaddrIn>(socket, &mut parts, Some(&mut control), MsgFlags::empty())?;
        let to = message.cmsgs()?.find_map(|control| match control {
            ControlMessageOwned::Ipv4PacketInfo(info) => Some(info),
            _ => None,
        });
        (message.bytes, message.address, to)
    };
    let mut info = to.ok_or(nix::errno::Errno::EINVAL)?;
    info.ipi_spec_dst = info.ipi_addr;
    info.ipi_ifindex = 0;
    let parts = [IoSlice::new(&buffer[..n])];
    let control = [ControlMessage::Ipv4PacketInfo(&info)];
    sendmsg(socket, &parts, &control, MsgFlags::empty(), from.as_ref()).map(drop)
}
