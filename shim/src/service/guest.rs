//! The shim's own API: what husk's commands ask of a guest and no engine does (`protocol/proto/shim.proto`).

use std::sync::Arc;

use async_trait::async_trait;
use husk_protocol::{
    agent::{ContainerRequest, DescribeProcessesResponse},
    shim::Guest,
};

use super::{Call, Tasks};

/// The shim's own API.
pub struct GuestService {
    tasks: Arc<Tasks>,
}

impl GuestService {
    /// For these tasks.
    pub fn new(tasks: &Arc<Tasks>) -> Self {
        Self {
            tasks: Arc::clone(tasks),
        }
    }
}

#[async_trait]
impl Guest for GuestService {
    async fn describe_processes(
        &self,
        _: Call<'_>,
        request: ContainerRequest,
    ) -> ttrpc::Result<DescribeProcessesResponse> {
        let container = self.tasks.get(&request.container_id)?;
        Ok(container.describe_processes().await?)
    }
}
