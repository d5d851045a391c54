//! placeholder
use crate::args::TopArgs;
use crate::exit::Code;
pub(crate) async fn run(_args: TopArgs) -> Code {
    Code::Stopped
}
